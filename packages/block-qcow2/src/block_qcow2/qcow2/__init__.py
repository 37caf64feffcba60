"""The qcow2 engine. `format` is the specification in Python; `image` puts the parts together."""
