"""Tables, figures and reports, made from what the stages wrote."""
