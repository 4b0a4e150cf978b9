"""From a model and a plan to ONNX graphs and a bundle."""
