"""The bundled ``scenes`` family: drawn and captioned 64x64 pictures, and the small real models trained on them."""
