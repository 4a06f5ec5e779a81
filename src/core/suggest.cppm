// "Did you mean …?": finds the valid word nearest to a misspelt one.
export module core.suggest;
import core.std;

export namespace fl {

/// Damerau-Levenshtein distance (insert, delete, replace a letter, swap two neighbours; each place edited once).
/// Returns limit + 1 for distances above `limit` and for words longer than 48 letters.
constexpr usize edit_distance(std::string_view a, std::string_view b, usize limit) {
    constexpr usize longest = 48;
    if (a.size() > longest || b.size() > longest ||
        (a.size() > b.size() ? a.size() - b.size() : b.size() - a.size()) > limit) {
        return limit + 1;
    }
    // Three rows of the usual table: [i][j] is the distance of the first i letters of a to the first j letters of b.
    std::array<std::array<usize, longest + 1>, 3> rows{};
    for (usize j = 0; j <= b.size(); ++j) {
        rows[0][j] = j;
    }
    for (usize i = 1; i <= a.size(); ++i) {
        auto& row = rows[i % 3];
        const auto& above = rows[(i - 1) % 3];
        row[0] = i;
        for (usize j = 1; j <= b.size(); ++j) {
            const usize replaced = above[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
            row[j] = std::min({above[j] + 1, row[j - 1] + 1, replaced});
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
                row[j] = std::min(row[j], rows[(i - 2) % 3][j - 2] + 1);
            }
        }
    }
    return std::min(rows[a.size() % 3][b.size()], limit + 1);
}

/// The nearest word of `valid`, the first of several; empty if none is near enough: at most 1 edit for words of up to 3
/// letters, 2 for up to 7, otherwise 3.
constexpr std::string_view suggest(std::string_view word, std::span<const std::string_view> valid) {
    const usize limit = word.size() <= 3 ? 1 : word.size() <= 7 ? 2 : 3;
    std::string_view best;
    usize best_distance = limit + 1;
    for (std::string_view candidate : valid) {
        const usize d = edit_distance(word, candidate, limit);
        if (d < best_distance && d < std::max(word.size(), candidate.size())) {
            best = candidate;
            best_distance = d;
        }
    }
    return best;
}

} // namespace fl
