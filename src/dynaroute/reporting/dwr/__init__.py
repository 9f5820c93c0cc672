"""The reports of the DWR half: what was read, what follows from it by stated rules, pages and figures."""
