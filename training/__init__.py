"""How the DiffCode model is made: data, degradations, three training stages, evaluation."""
