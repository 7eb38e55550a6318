"""Both stages, sampling and export on models of the published sizes, with random weights."""
