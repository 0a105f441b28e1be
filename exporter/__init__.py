"""Hugging Face to bundle: model registry, weight naming, vision export, and the phases of an export."""
