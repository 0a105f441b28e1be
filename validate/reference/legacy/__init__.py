"""Hugging Face's own modules, holding the weights of releases that transformers cannot load."""
