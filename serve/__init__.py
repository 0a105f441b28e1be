"""A bundle as a service: many questions at a time, answered over HTTP, by Triton or by Ray. Needs no torch."""

MODEL_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"  # of a bundle, in URLs, in Triton's folders and in logs
