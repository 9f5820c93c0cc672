"""The DAGFormer report: pages and figures."""
