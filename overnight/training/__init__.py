"""The training engine: one fine-tuning run, on any machine that has torch, transformers and accelerate."""
