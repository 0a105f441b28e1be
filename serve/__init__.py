"""A bundle as a service: many questions at a time, answered over HTTP, by Triton or by Ray. Needs no torch."""
