"""What was tuned, as others read it: merged weights, an adapter, ONNX graphs; each with a card."""
