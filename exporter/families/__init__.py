"""The families of models: a class in a file each, beside the towers and tokenizers that they are made of."""
