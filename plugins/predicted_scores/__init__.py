"""PredictedScores: the importance of cached tokens, predicted from their keys and values, and how many exceed a threshold."""
