"""How and where numbers are computed: device, precision, quantisation, compilation, optimisers, random numbers, processes."""
