"""One file a family of models; registry.py lists them."""
