"""The stochastic matmul.

streams (integers) -> encoding (floats to codes) -> a backend's counts -> matmul (checks, dispatch, rescaling)
                                                  -> linear, attention (what models call)
"""
