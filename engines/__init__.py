"""What turns an ONNX stage into something that runs: bundle, backends, and the pipeline that chains stages."""
