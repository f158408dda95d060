"""The bundled ``scenes`` family: procedurally drawn, captioned 64x64 pictures and the small real models trained on them."""
