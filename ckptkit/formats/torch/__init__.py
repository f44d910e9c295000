"""torch's own files: zip, legacy, tar, TorchScript, export; read, written and edited."""
