"""Runners, the denoising loop, comparison."""
