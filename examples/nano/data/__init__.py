"""Generated problems: questions, reasoning and answers, all made up here."""
