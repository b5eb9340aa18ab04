"""Post-training quantisation: statistics of calibration inputs, GPTQ, AWQ, SmoothQuant, and the pass over the layers of
a model that applies them (docs/quantisation.md).
"""
