//! The OpenAI API: validation, admission, token ledger, streaming
