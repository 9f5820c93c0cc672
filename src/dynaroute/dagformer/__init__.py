"""DAGFormer: a predictor wires the attention heads of a frozen language model into a context-dependent DAG."""
