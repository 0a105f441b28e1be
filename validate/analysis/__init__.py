"""How information flows from the image to the answer, computed on Hugging Face's own layers, one layer at a time."""
