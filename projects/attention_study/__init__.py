"""Comparison of attentions, and of the options of the softmax-free attention, on small models with several seeds."""
