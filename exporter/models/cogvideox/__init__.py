"""CogVideoX1.5: config, model, weights."""
