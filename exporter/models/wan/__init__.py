"""Wan2.1: config, model, weights."""
