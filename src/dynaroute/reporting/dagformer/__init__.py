"""The DAGFormer report: its page, its figures, and its section of the page of measurements."""
