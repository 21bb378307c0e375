// A line is read once, front to back, and checked as a whole: grammar, escapes, UTF-8. Only the string that is wanted is
// written out. Nearly all bytes of a corpus are printable ASCII inside strings, and those go 16 at a time.
#include "records/jsonl.h"

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ledom {
namespace {

constexpr int kDeepest = 100;          // Python's json gives up some way beyond
constexpr ptrdiff_t kLongest = 1000;   // characters of a number; Python's json refuses 4,300 digits
constexpr ptrdiff_t kStep = 16;        // bytes of a string that are looked at, and written, at once

bool is_digit(unsigned char c) { return c >= '0' && c <= '9'; }

bool is_tail(unsigned char c) { return (c & 0xC0) == 0x80; }

// Bytes of the UTF-8 character that starts at a byte beyond ASCII; 0 where there is none.
int length_of_character(const unsigned char* s, ptrdiff_t left) {
    const unsigned char lead = s[0];
    if (lead < 0xC2 || lead > 0xF4) return 0;
    const int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if (left < length) return 0;
    // The second byte rules out what is written longer than need be, surrogates, and what is beyond Unicode.
    const unsigned char least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned char most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (s[1] < least || s[1] > most) return 0;
    for (int i = 2; i < length; ++i) {
        if (!is_tail(s[i])) return 0;
    }
    return length;
}

// What a letter behind a backslash stands for; 0 for nothing.
struct Escapes {
    unsigned char meaning[256] = {};
    constexpr Escapes() {
        const char kinds[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
        for (int i = 0; kinds[i]; ++i) meaning[static_cast<int>(kinds[i])] = static_cast<unsigned char>(meanings[i]);
    }
};
constexpr Escapes kEscapes;

unsigned char* write_character(uint32_t code, unsigned char* out) {
    if (code < 0x80) {
        *out++ = static_cast<unsigned char>(code);
        return out;
    }
    const int tails = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    const unsigned leads[] = {0, 0xC0, 0xE0, 0xF0};
    *out++ = static_cast<unsigned char>(leads[tails] | code >> 6 * tails);
    for (int i = tails - 1; i >= 0; --i) *out++ = static_cast<unsigned char>(0x80 | (code >> 6 * i & 0x3F));
    return out;
}

// Each function reads what its name says, moves `at_` behind it, and is false where something else stands there.
class Line {
  public:
    Line(std::string_view line, std::string_view key, unsigned char* room)
        : at_(reinterpret_cast<const unsigned char*>(line.data())), end_(at_ + line.size()), key_(key), room_(room) {}

    std::optional<std::string_view> text() {
        space();
        if (!is_next('{') || !object<true>(0)) return std::nullopt;
        space();
        if (at_ != end_ || !out_) return std::nullopt;
        return std::string_view(reinterpret_cast<const char*>(room_), static_cast<size_t>(out_ - room_));
    }

  private:
    bool is_next(char wanted) {
        if (at_ == end_ || *at_ != wanted) return false;
        ++at_;
        return true;
    }

    void space() {
        while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
    }

    // Behind its brace. The key is looked for in the outermost object only.
    template <bool kIsOutermost>
    bool object(int depth) {
        space();
        if (is_next('}')) return true;
        do {
            space();
            if (!is_next('"')) return false;
            const char* first = reinterpret_cast<const char*>(at_);
            if (!string<false>()) return false;
            const std::string_view name(first, static_cast<size_t>(reinterpret_cast<const char*>(at_) - 1 - first));
            space();
            if (!is_next(':')) return false;
            space();
            if (kIsOutermost && name.find('\\') != name.npos) return false;  // it may be the key, written with escapes
            if (kIsOutermost && name == key_) {
                out_ = room_;
                if (!is_next('"') || !string<true>()) return false;
            } else if (!value(depth + 1)) {
                return false;
            }
            space();
        } while (is_next(','));
        return is_next('}');
    }

    bool array(int depth) {
        space();
        if (is_next(']')) return true;
        do {
            space();
            if (!value(depth + 1)) return false;
            space();
        } while (is_next(','));
        return is_next(']');
    }

    bool value(int depth) {
        if (depth > kDeepest || at_ == end_) return false;
        switch (*at_) {
            case '"':
                ++at_;
                return string<false>();
            case '{':
                ++at_;
                return object<false>(depth);
            case '[':
                ++at_;
                return array(depth);
            case 't':
                return word("true");
            case 'f':
                return word("false");
            case 'n':
                return word("null");
            default:
                return number();
        }
    }

    bool word(std::string_view wanted) {
        if (static_cast<size_t>(end_ - at_) < wanted.size() || memcmp(at_, wanted.data(), wanted.size()) != 0) return false;
        at_ += wanted.size();
        return true;
    }

    bool digits() {
        const unsigned char* first = at_;
        while (at_ != end_ && is_digit(*at_)) ++at_;
        return at_ != first;
    }

    bool number() {
        const unsigned char* first = at_;
        is_next('-');
        if (!is_next('0') && !digits()) return false;
        if (is_next('.') && !digits()) return false;
        if (is_next('e') || is_next('E')) {
            if (!is_next('+')) is_next('-');
            if (!digits()) return false;
        }
        return at_ - first <= kLongest;
    }

    // Behind its opening quote. With kIsWanted it is written to `out_`, kStep bytes at a time: there is room.
    template <bool kIsWanted>
    bool string() {
        for (;;) {
            plain<kIsWanted>();
            if (at_ == end_) return false;
            if (*at_ == '"') {
                ++at_;
                return true;
            }
            if (*at_ == '\\') {
                ++at_;
                if (!escape<kIsWanted>()) return false;
            } else if (*at_ < 0x80 || !characters<kIsWanted>()) {  // control characters are written with an escape
                return false;
            }
        }
    }

    // ASCII that stands for itself.
    template <bool kIsWanted>
    void plain() {
#if defined(__SSE2__)
        while (end_ - at_ >= kStep) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at_));
            if (kIsWanted) _mm_storeu_si128(reinterpret_cast<__m128i*>(out_), bytes);
            // As signed numbers the bytes beyond ASCII are below the space, like the control characters.
            const __m128i is_other = _mm_or_si128(_mm_cmplt_epi8(bytes, _mm_set1_epi8(' ')),
                                                  _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('"')),
                                                               _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\'))));
            const int found = _mm_movemask_epi8(is_other);
            const ptrdiff_t count = found ? __builtin_ctz(static_cast<unsigned>(found)) : kStep;
            at_ += count;
            if (kIsWanted) out_ += count;
            if (found) return;
        }
#endif
        while (at_ != end_ && *at_ >= ' ' && *at_ < 0x80 && *at_ != '"' && *at_ != '\\') {
            if (kIsWanted) *out_++ = *at_;
            ++at_;
        }
    }

    template <bool kIsWanted>
    bool characters() {
        while (at_ != end_ && *at_ >= 0x80) {
            const int length = length_of_character(at_, end_ - at_);
            if (length == 0) return false;
            if (kIsWanted) {
                for (int i = 0; i < length; ++i) *out_++ = at_[i];
            }
            at_ += length;
        }
        return true;
    }

    // Behind its backslash.
    template <bool kIsWanted>
    bool escape() {
        if (at_ == end_) return false;
        const unsigned char kind = *at_++;
        if (kind == 'u') return unit<kIsWanted>();
        const unsigned char meant = kEscapes.meaning[kind];
        if (kIsWanted) *out_++ = meant;
        return meant != 0;
    }

    template <bool kIsWanted>
    bool unit() {
        int64_t code = hexadecimal();
        if (code < 0) return false;
        if (code >= 0xD800 && code < 0xE000) {  // half of a pair
            if (code >= 0xDC00 || !is_next('\\') || !is_next('u')) return false;
            const int64_t low = hexadecimal();
            if (low < 0xDC00 || low >= 0xE000) return false;
            code = 0x10000 + (code - 0xD800) * 0x400 + (low - 0xDC00);
        }
        if (kIsWanted) out_ = write_character(static_cast<uint32_t>(code), out_);
        return true;
    }

    // Four digits; -1 where they are not there.
    int64_t hexadecimal() {
        if (end_ - at_ < 4) return -1;
        int64_t code = 0;
        for (int i = 0; i < 4; ++i) {
            const unsigned char c = *at_++, letter = c | 0x20;
            if (!is_digit(c) && !(letter >= 'a' && letter <= 'f')) return -1;
            code = code * 16 + (is_digit(c) ? c - '0' : letter - 'a' + 10);
        }
        return code;
    }

    const unsigned char* at_;
    const unsigned char* const end_;
    const std::string_view key_;
    unsigned char* const room_;
    unsigned char* out_ = nullptr;
};

}  // namespace

// No escape is shorter than what it stands for, so that a text is no longer than its line.
TextReader::TextReader(size_t longest) : room_(new unsigned char[longest + kStep]) {}

std::optional<std::string_view> TextReader::read(std::string_view line, std::string_view key) {
    return Line(line, key, room_.get()).text();
}

}  // namespace ledom
