"""The model of a job: its configuration read strictly, its weights loaded without inventing any, its content named.

Torch and transformers are imported where they are used only, so that a driver can look at a model's directory without
them. No code that comes with a model is ever run, and nothing is downloaded.
"""
