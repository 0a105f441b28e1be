"""A bundle as models of NVIDIA Triton: a repository that is written, and what its Python backend runs."""
