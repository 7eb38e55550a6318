"""The formulas of the method as pure functions; torch is the only import.

``flow``         rectified flow, guidance and the CPS sampler (method, sections 1 and 2)
``subinterval``  diffusion inside the interval above a boundary (section 3)
``losses``       the losses of both stages (sections 3 and 4)
``advantages``   group-relative advantages (section 4)

Noise and random draws are arguments, never drawn inside. Latents may have any floating dtype; results are
float32, or float64 as soon as one input tensor is float64. Casting back to the network's dtype is left to
the caller, once.
"""
