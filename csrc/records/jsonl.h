// The string under a key of a line of JSONL, found without building the rest of the line.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace ledom {

// Reads lines of at most `longest` bytes.
class TextReader {
  public:
    explicit TextReader(size_t longest);

    // The text under `key` as UTF-8, which stays until the next call. Nothing where the line is not one JSON object with
    // a string there beyond doubt: it may be bad, or written in a way that a full parser must look at (a name with an
    // escape, half of a surrogate pair, NaN, deep nesting, a number of a thousand digits). What is read is what Python's
    // json gives: the last value counts where a name stands twice.
    std::optional<std::string_view> read(std::string_view line, std::string_view key);

  private:
    std::unique_ptr<unsigned char[]> room_;
};

}  // namespace ledom
