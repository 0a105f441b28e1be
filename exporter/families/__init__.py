"""The families of models: one file each with its FAMILY row, beside the towers and tokenizers that they are made of."""
