"""What a hand-written gradient has to survive: finite differences, every transformation, an audit of what it keeps."""
