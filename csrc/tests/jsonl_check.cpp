// The reader of JSONL under the sanitizers: lines that end where their memory ends, whole, cut anywhere and damaged at
// random, and a few whose texts are known. What a text must be in general, tests/unit/test_data_records.py asks Python.
#include "records/jsonl.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>

namespace {

int faults = 0;
long num_read = 0;

// Reads from memory that holds the line and nothing more.
std::optional<std::string> read(const std::string& line, const std::string& key = "text") {
    const std::unique_ptr<char[]> memory(new char[line.size()]);
    memcpy(memory.get(), line.data(), line.size());
    ledom::TextReader reader(line.size());
    const auto text = reader.read(std::string_view(memory.get(), line.size()), key);
    num_read += text.has_value();
    return text ? std::optional<std::string>(*text) : std::nullopt;
}

void expect(const std::string& line, const std::optional<std::string>& text) {
    if (read(line) == text) return;
    ++faults;
    printf("another text of %s\n", line.c_str());
}

}  // namespace

int main() {
    const std::string lines[] = {
        R"({"text": "a line that is longer than what is looked at at once\n\t\"and\" goes on", "n": [1, -2.5e+3, {}]})",
        R"({"id": {"a": [true, false, null, "\ud83d\ude42 é 東 🙂"], "b": {}}, "text": "\u0000\u00e9\u6771\/é東🙂"})",
        "{\"text\":\"" + std::string(100, 'x') + "\"}",
        R"({"text": ""})",
    };
    expect(R"({"text": "\u00e9\u0041\n", "text": "b\ud83d\ude42"} )", "b🙂");
    expect(R"({"text": ""})", "");
    for (const char* bad : {"", "{", R"({"text": "a"}})", R"({"text": "a)", R"({"text": "a\)", R"({"text": "\ud83d"})", R"({"text": 1})",
                            R"({"a": "text"})", R"(["text"])", R"({"text": "a",})", R"({"te\u0078t": "a"})", "{\"text\": \"\xed\xa0\x80\"}"}) {
        expect(bad, std::nullopt);
    }
    for (const std::string& line : lines) {
        if (!read(line)) ++faults;
        for (size_t size = 0; size < line.size(); ++size) expect(line.substr(0, size), std::nullopt);
    }
    std::mt19937 random(1);
    const std::string pieces = "\"\\{}[]:,0-.eEu \t\x01\x7f\x80\xc3\xe6\xed\xf0\xf4\xff";
    for (int i = 0; i < 200000; ++i) {
        std::string line = lines[random() % 4];
        for (unsigned changes = 1 + random() % 3; changes > 0; --changes) {
            const char piece = pieces[random() % pieces.size()];
            const size_t place = random() % line.size();
            if (random() % 2) {
                line[place] = piece;
            } else {
                line.insert(place, 1, piece);
            }
        }
        read(line);
    }
    printf("%ld texts, %d faults\n", num_read, faults);
    return faults == 0 && num_read > 1000 ? 0 : 1;
}
