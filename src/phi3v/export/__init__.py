"""What was tuned, as others read it: merged weights, an adapter, ONNX graphs; each with its card, to the hub if asked."""
