"""Quantised weights in Hugging Face layout: several stored tensors make one weight, which is dequantised when it is read."""
