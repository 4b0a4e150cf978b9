"""HunyuanVideo: config, model, weights."""
