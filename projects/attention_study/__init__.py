"""Compare attentions, and the options of the softmax-free attention, on one small model with several seeds."""
