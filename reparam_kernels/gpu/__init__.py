"""The Triton device functions and the planning of launches that all ops share."""
