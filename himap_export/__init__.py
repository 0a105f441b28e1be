"""Staged, visually pruned, compiled engines of Hugging Face multimodal LLMs (HiMAP, arXiv 2503.13108)."""
