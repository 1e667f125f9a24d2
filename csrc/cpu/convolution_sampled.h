// What sampled_convolution_ does: dy_i (+)= conv(x, dW_i) for k sampled tangents of the weight, as an implicit product
// of matrices: a column is a place of the result in one image, a row an input channel and a place of the kernel (a
// tap).
//
// x is turned so that images lie side by side, and unfolded once for all k, some places at a time; neither the whole of
// that nor a tangent is ever there. As the columns of a panel belong to few places, a tap that lies in the padding for
// all of them is left out: of a 3x3 kernel on images of 4x4, three rows in ten. A thread draws k tangents of some
// filters into second-level cache and takes them through the panels on the register tile.
//
// Floor per tangent and weight element: one draw, and a fused multiply-add for each place that finds it in the image.
// The sums run over channels and taps in order: no bit depends on the number of tangents, images or threads.
#pragma once

#include <cstring>

#include "../arguments/convolution.h"
#include "product.h"

namespace frog::sampled {

constexpr int64_t kImages = 64;                      // at a time
constexpr int64_t kUnfoldedBytes = 8 * 1024 * 1024;  // of x, in last-level cache
constexpr int64_t kFewestColumns = 512;              // unfolded together: fewer do not pay for drawing the weight
constexpr int64_t kDrawnBytes = 512 * 1024;          // of tangents, in second-level cache
constexpr int64_t kPanelBytes = 16 * 1024;  // of a panel, between two loads of the sums; they stay in first-level cache
constexpr int64_t kStripRows = 96;          // of all tangents, that share the loads of a panel
constexpr int64_t kTaskProducts = int64_t{1} << 18;  // that are worth a thread

// How the results of some images become columns: place by place, and at a place image by image.
struct Columns {
  int64_t lanes = 1;   // columns of a place: as many as images, up to a power of two or to whole vectors
  int64_t width = 1;   // of a panel: several places, or some lanes of one
  int64_t places = 1;  // of a panel
  int64_t panels = 1;  // of a group
  int64_t group = 1;   // places whose sums are collected before they are written

  Columns(int64_t images, int64_t panel, int64_t vector) {
    while (lanes < std::min(images, vector)) lanes *= 2;
    if (images > vector) lanes = ceil_div(images, vector) * vector;
    places = std::max<int64_t>(1, std::max(panel / 2, vector) / lanes);
    width = std::min(panel, places * lanes);
    group = places * ceil_div(std::clamp<int64_t>(512 / lanes, 1, 16), places);
    panels = group / places * parts();
  }
  int64_t parts() const { return ceil_div(places * lanes, width); }  // panels of a place that has several
  int64_t size() const { return group * lanes; }
};

// Panel p of a stretch of groups: its first place, and which columns of it
struct Panel {
  int64_t place, lane, width;

  Panel(const Columns& c, int64_t p)
      : place(p / c.parts() * c.places),
        lane(p % c.parts() * c.width),
        width(std::min(c.width, c.places * c.lanes - lane)) {}
};

// Which columns of a panel find a tap where in the turned image; those beside it find zeros.
struct Piece {
  int64_t at, count, from;
};

// The taps that lie in the image for some of a panel's `count` places from `first` on, and what the columns find.
struct Found {
  std::vector<int64_t> taps;
  std::vector<std::vector<Piece>> pieces;

  Found(const ConvolutionSizes& s, const Columns& c, const Panel& panel, int64_t first, int64_t count) {
    const auto& [depth, height, line] = s.axes;
    const int64_t lanes = std::min(c.lanes, panel.width);  // of a place
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      std::vector<Piece> found;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t place = first + p, row = place / line.count;
        const int64_t z = depth.at(row / height.count, tap / line.kernel / height.kernel);
        const int64_t y = height.at(row % height.count, tap / line.kernel % height.kernel);
        const int64_t x = line.at(place % line.count, tap % line.kernel);
        if (z < 0 || z >= depth.size || y < 0 || y >= height.size || x < 0 || x >= line.size) continue;
        const int64_t at = p * lanes, from = ((z * height.size + y) * line.size + x) * c.lanes + panel.lane;
        Piece* last = found.empty() ? nullptr : &found.back();
        if (last && last->at + last->count == at && last->from + last->count == from) {
          last->count += lanes;
        } else {
          found.push_back({at, lanes, from});
        }
      }
      if (found.empty()) continue;
      taps.push_back(tap);
      pieces.push_back(std::move(found));
    }
  }
};

// turned [elements, lanes] of images [count, elements], zeros in columns without an image
template <class T>
void turn(const T* images, int64_t count, int64_t elements, int64_t lanes, T* turned) {
  constexpr int64_t kElements = 4096;
  torch::stable::parallel_for(0, ceil_div(elements, kElements), 1, [&](int64_t a, int64_t b) {
    const int64_t from = a * kElements, to = std::min(elements, b * kElements);
    if (lanes % vector_width<T>() == 0) {
      pack(images + from, elements, count, to - from, lanes, turned + from * lanes);
      return;
    }
    for (int64_t e = from; e < to; ++e) {
      for (int64_t i = 0; i < lanes; ++i) turned[e * lanes + i] = i < count ? images[i * elements + e] : T(0);
    }
  });
}

// Mostly so few that a call would take longer
template <class T>
inline void copy_short(const T* from, int64_t count, T* to) {
  constexpr int64_t kRun = 8;
  int64_t j = 0;
  for (; j + kRun <= count; j += kRun) std::memcpy(to + j, from + j, kRun * sizeof(T));
  for (; j < count; ++j) to[j] = from[j];
}

// panel [channels, taps found, width]
template <class T>
void unfold(const ConvolutionSizes& s, const Found& found, const T* turned, int64_t lanes, int64_t width, T* panel) {
  const int64_t step = s.inputs() * lanes, ld = static_cast<int64_t>(found.taps.size()) * width;
  for (size_t j = 0; j < found.taps.size(); ++j) {
    int64_t covered = 0;
    for (const Piece& piece : found.pieces[j]) covered += piece.count;
    T* row = panel + static_cast<int64_t>(j) * width;
    const T* channel = turned;
    for (int64_t c = 0; c < s.channels; ++c, row += ld, channel += step) {
      if (covered < width) std::fill(row, row + width, T(0));
      for (const Piece& p : found.pieces[j]) copy_short(channel + p.from, p.count, row + p.at);
    }
  }
}

// to [*, step] += sums [places, lanes] turned, for `count` images; = without add
template <class T, class E>
void write(const T* sums, int64_t lanes, int64_t count, int64_t places, T* turned, bool add, int64_t step, E* to) {
  const int64_t vector = vector_width<T>(), width = ceil_div(places, vector) * vector;
  const bool by_vectors = places >= vector;
  if (by_vectors) pack(sums, lanes, places, count, width, turned);
  for (int64_t i = 0; i < count; ++i, to += step) {
    const T* from = by_vectors ? turned + i * width : sums + i;
    const int64_t ld = by_vectors ? 1 : lanes;
    if (add) {
      for (int64_t p = 0; p < places; ++p) to[p] = static_cast<E>(static_cast<T>(to[p]) + from[p * ld]);
    } else {
      for (int64_t p = 0; p < places; ++p) to[p] = static_cast<E>(from[p * ld]);
    }
  }
}

// self (+)= of `count` images from `first_image` on
template <class T, class E>
void convolve_some(const ConvolutionSizes& s, const DrawSpec& spec, int64_t k, int64_t offset, const T* x,
                   int64_t first_image, int64_t count, bool add, E* self) {
  constexpr int64_t kBytes = sizeof(T);
  const Columns c(count, panel_width<T>(), vector_width<T>());
  const int64_t rows = s.rows(), taps = s.taps(), outputs = s.outputs(), columns = c.size();
  const int64_t groups = ceil_div(outputs, c.group), panels = c.panels;
  const int64_t unfolded_group = panels * c.width * rows;  // the last panel of a place may be narrower
  const int64_t fitting = kUnfoldedBytes / std::max<int64_t>(1, unfolded_group * kBytes);
  const int64_t together = std::min(groups, std::max(fitting, ceil_div(kFewestColumns, columns)));
  const int64_t strip = std::min(s.filters, kTileRows * std::max<int64_t>(1, kStripRows / (kTileRows * k)));
  const int64_t strips = ceil_div(s.filters, std::max<int64_t>(1, strip));
  // Channels drawn together: normal elements are drawn 64 at a time
  int64_t channels = std::max<int64_t>(1, kDrawnBytes / std::max<int64_t>(1, k * strip * taps * kBytes));
  if (channels > kNormalGroup) channels = channels / kNormalGroup * kNormalGroup;
  channels = std::clamp<int64_t>(s.channels, 1, channels);
  const bool at_once = channels >= s.channels;  // sums are complete before the next group
  const int64_t held = k * strip * columns;     // sums of a group
  const int64_t steps = kPanelBytes / (c.width * kBytes);
  const int64_t grain = std::max<int64_t>(1, kTaskProducts / std::max<int64_t>(1, k * strip * rows * columns));

  Scratch<T> turned(s.channels * s.inputs() * c.lanes), unfolded(together * unfolded_group);
  Scratch<int32_t> listed(together * panels * channels * taps);  // of each panel: where its rows lie in a drawn filter
  std::vector<int64_t> found(together * panels);                 // taps of each panel
  turn(x + first_image * s.channels * s.inputs(), count, s.channels * s.inputs(), c.lanes, turned.data());
  for (int64_t g0 = 0; g0 < groups; g0 += together) {
    const int64_t here = std::min(together, groups - g0);
    torch::stable::parallel_for(0, here * panels, 1, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        const Panel panel(c, p);
        const int64_t place = g0 * c.group + panel.place;
        const Found f(s, c, panel, place, std::clamp<int64_t>(outputs - place, 0, c.places));
        const int64_t n = found[p] = static_cast<int64_t>(f.taps.size());
        unfold(s, f, turned.data(), c.lanes, panel.width, unfolded.data() + p * c.width * rows);
        int32_t* list = listed.data() + p * channels * taps;
        for (int64_t j = 0; j < channels * n; ++j) list[j] = static_cast<int32_t>(j / n * taps + f.taps[j % n]);
      }
    });
    // A unit of work is a strip of filters times a group of places
    torch::stable::parallel_for(0, strips * here, grain, [&](int64_t from, int64_t to) {
      Scratch<T> drawn(k * strip * channels * taps), sums(held * (at_once ? 1 : here));
      Scratch<T> across(c.lanes * ceil_div(c.group, vector_width<T>()) * vector_width<T>());
      for (int64_t unit = from; unit < to; unit = (unit / here + 1) * here) {
        const int64_t o = unit / here * strip, n = std::min(strip, s.filters - o);
        const int64_t first = unit % here, last = std::min(here, first + to - unit);
        for (int64_t c0 = 0; c0 == 0 || c0 < s.channels; c0 += channels) {
          const int64_t some = std::min(channels, s.channels - c0), length = some * taps;
          const int64_t start = offset + o * rows + c0 * taps, ld = n * length;  // drawn [k, n, length]
          if (at_once) {
            draw(spec, k, start, ld, drawn.data(), ld);
          } else {
            for (int64_t f = 0; f < n; ++f) draw(spec, k, start + f * rows, length, drawn.data() + f * length, ld);
          }
          for (int64_t g = first; g < last; ++g) {
            T* sum = sums.data() + (at_once ? 0 : g * held);
            const int64_t place = (g0 + g) * c.group, live = std::min(c.group, outputs - place);
            for (int64_t p = g * panels; p < (g + 1) * panels; ++p) {
              const Panel panel(c, p);
              const int64_t depth = found[p] * some, column = (panel.place - g * c.group) * c.lanes + panel.lane;
              const T* xt = unfolded.data() + p * c.width * rows + found[p] * c0 * panel.width;
              const int32_t* list = listed.data() + p * channels * taps;
              for (int64_t r = 0; r == 0 || r < depth; r += steps) {
                for (int64_t i = 0; i < k; ++i) {
                  tile_listed(xt + r * panel.width, panel.width, drawn.data() + i * ld, length, list + r, n,
                              std::min(steps, depth - r), sum + i * n * columns + column, columns, c0 + r == 0);
                }
              }
            }
            if (c0 + channels < s.channels) continue;
            for (int64_t i = 0; i < k; ++i) {
              for (int64_t f = 0; f < n; ++f) {
                write(sum + (i * n + f) * columns, c.lanes, count, live, across.data(), add, s.filters * outputs,
                      self + ((i * s.images + first_image) * s.filters + o + f) * outputs + place);
              }
            }
          }
        }
      }
    });
  }
}

// self [k, images, filters, *] (+)= conv(x, dW_i), some images after the other
template <class T, class E>
void convolve(const ConvolutionSizes& s, const DrawSpec& spec, int64_t k, int64_t offset, const T* x, bool add,
              E* self) {
  for (int64_t first = 0; first < s.images; first += kImages) {
    convolve_some(s, spec, k, offset, x, first, std::min(kImages, s.images - first), add, self);
  }
}

}  // namespace frog::sampled
