"""Trainable Dynamic Mask Attention (arXiv 2508.02124): selection, functional form, module and model."""
