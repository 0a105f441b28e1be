"""How OpenVINO reads our graphs and runs them: rules for operators that its ONNX frontend lacks, tensors, requests."""
