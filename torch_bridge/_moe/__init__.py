"""The expert layer on torch tensors: what is asked, how it runs directly, and over DLPack."""
