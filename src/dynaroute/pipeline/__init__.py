"""What any stage needs to run: locks, scratch folders, atomic outputs, the command line, the machine."""
