"""PyTorch and Hugging Face: export, import, and the proof that nothing changed on the way."""
