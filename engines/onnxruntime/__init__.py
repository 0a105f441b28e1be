"""What onnxruntime reads in the place of our quantised linear layers."""
