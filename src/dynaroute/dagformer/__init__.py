"""DAGFormer: a predictor wires the attention heads of a frozen OLMo-2 into a context-dependent DAG."""
