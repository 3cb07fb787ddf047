#include "io/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "mustafar/error.h"
#include "support/model_folder.h"

namespace mustafar {
namespace {

using testing::little_endian;
using testing::safetensors_bytes;
using testing::TemporaryFolder;

constexpr const char* kGood = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return std::string(R"({"dtype":")")
      .append(dtype)
      .append(R"(","shape":)")
      .append(shape)
      .append(R"(,"data_offsets":)")
      .append(offsets)
      .append("}");
}
std::string header_a(const std::string& tensor) {
  return std::string("{\"a\":").append(tensor).append("}");
}

std::vector<SafetensorsEntry> entries_of(const std::string& bytes) {
  TemporaryFolder folder;
  return SafetensorsFile::open(folder.write("x.safetensors", bytes)).entries;
}

TEST(SafetensorsTest, ReadsEntriesInTheOrderOfTheirBytes) {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"b":{"data_offsets":[4,10],"dtype":"BF16","shape":[3,1]},)"
      R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4],"later":{"x":[1,null,"y"]}},)"
      R"("c":{"dtype":"F4","shape":[0,7],"data_offsets":[10,10]}}  )";
  const auto entries = entries_of(safetensors_bytes(header, "0123456789"));
  ASSERT_EQ(entries.size(), 3u);
  EXPECT_EQ(entries[0].name, "a");
  EXPECT_STREQ(entries[0].dtype, "F32");
  EXPECT_TRUE(entries[0].shape.empty());
  EXPECT_EQ(entries[0].begin, 8 + header.size());
  EXPECT_EQ(entries[1].name, "b");
  EXPECT_EQ(entries[1].shape, (std::vector<uint64_t>{3, 1}));
  EXPECT_EQ(entries[1].end, 8 + header.size() + 10);
  EXPECT_EQ(entries[2].name, "c");
}

TEST(SafetensorsTest, ReadsAFileWithoutTensors) {
  EXPECT_TRUE(entries_of(safetensors_bytes("{}", "")).empty());
  EXPECT_TRUE(entries_of(safetensors_bytes(R"({"__metadata__":null})", "")).empty());
}

TEST(SafetensorsTest, KnowsEveryDtypeOfTheFormat) {
  const std::vector<std::pair<const char*, int>> eight_values = {
      {"BOOL", 8},    {"U8", 8},          {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8},
      {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"F4", 4},      {"F6_E2M3", 6},
      {"F6_E3M2", 6}, {"I16", 16},        {"U16", 16},        {"F16", 16},    {"BF16", 16},
      {"I32", 32},    {"U32", 32},        {"F32", 32},        {"C64", 64},    {"F64", 64},
      {"I64", 64},    {"U64", 64}};
  for (const auto& [dtype, bytes] : eight_values) {
    const std::string header = header_a(entry(dtype, "[8]", "[0," + std::to_string(bytes) + "]"));
    EXPECT_EQ(entries_of(safetensors_bytes(header, std::string(bytes, 'x'))).size(), 1u) << dtype;
  }
}

struct BadFile {
  const char* name;
  std::string bytes;
  const char* message;
};
void PrintTo(const BadFile& bad, std::ostream* out) { *out << bad.name; }

class BadSafetensorsTest : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadSafetensorsTest, IsRefused) {
  TemporaryFolder folder;
  const auto path = folder.write("bad.safetensors", GetParam().bytes);
  EXPECT_MODEL_ERROR(SafetensorsFile::open(path), GetParam().message);
  try {
    SafetensorsFile::open(path);
  } catch (const ModelError& error) {  // names the file, and is fit for any terminal and encoding
    const std::string message = error.what();
    EXPECT_EQ(message.rfind(path.string() + ": ", 0), 0u);
    EXPECT_TRUE(
        std::all_of(message.begin(), message.end(), [](char c) { return c >= 0x20 && c < 0x7f; }));
  }
}

std::vector<BadFile> bad_files() {
  const std::string f32 = entry("F32", "[1]", "[0,4]");
  const auto one = [](const std::string& tensor, const std::string& data = "1234") {
    return safetensors_bytes(header_a(tensor), data);
  };
  std::string deep = header_a(f32);
  deep.insert(deep.size() - 2, ",\"x\":" + std::string(100'000, '[') + std::string(100'000, ']'));
  std::string deep_objects = "{\"a\":";
  for (int i = 0; i < 100'000; i++) deep_objects += "{\"x\":";
  std::string rank = "[1";
  for (int i = 1; i < 10'000; i++) rank += ",1";
  rank += "]";
  return {
      {"NoBytes", "", "expected at least 8 bytes (safetensors header length), found 0"},
      {"SevenBytes", "1234567", "expected at least 8 bytes (safetensors header length), found 7"},
      {"HeaderLengthZero", little_endian(0), "expected to begin with '{'"},
      {"HeaderLengthBeyondFile", little_endian(3) + "{}", "reach beyond the end of the file"},
      {"HeaderLengthOverCap", little_endian(100'000'001) + "{}",
       "expected at most 100000000 bytes, found 100000001"},
      {"HeaderLengthMax", little_endian(~uint64_t{0}) + "{}", "found 18446744073709551615"},
      {"GitLfsPointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
       "is a git-LFS pointer"},
      {"NotUtf8", one("{\"\xff\":1}"), "not valid JSON"},
      {"OverlongUtf8", one("{\"\xc0\xaf\":1}"), "not valid JSON"},
      {"ByteOrderMark", safetensors_bytes("\xef\xbb\xbf" + std::string(kGood), "1234"),
       "expected to begin with '{'"},
      {"LeadingSpace", safetensors_bytes(" " + std::string(kGood), "1234"),
       "expected to begin with '{'"},
      {"List", safetensors_bytes("[]", ""), "expected to begin with '{'"},
      {"Null", safetensors_bytes("null", ""), "expected to begin with '{'"},
      {"TrailingJson", safetensors_bytes(std::string(kGood) + "{}", "1234"), "not valid JSON"},
      {"TrailingComma", safetensors_bytes(header_a(f32 + ","), "1234"), "not valid JSON"},
      {"NulPadding", safetensors_bytes(std::string(kGood) + std::string(3, '\0'), "1234"),
       "NUL is not JSON"},
      {"Truncated", safetensors_bytes(R"({"a":{"dtype":"F32")", ""), "not valid JSON"},
      {"DuplicateName", safetensors_bytes("{\"a\":" + f32 + ",\"a\":" + f32 + "}", "1234"),
       "tensor \"a\" appears twice"},
      {"DuplicateNameEscaped",
       safetensors_bytes("{\"a\":" + f32 + ",\"\\u0061\":" + f32 + "}", "1234"),
       "tensor \"a\" appears twice"},
      {"DuplicateDtype", one(R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})"),
       "tensor \"a\": \"dtype\" appears twice"},
      {"DuplicateShape", one(R"({"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]})"),
       "\"shape\" appears twice"},
      {"DuplicateMetadata", safetensors_bytes(R"({"__metadata__":{},"__metadata__":{}})", ""),
       "\"__metadata__\" appears twice"},
      {"MetadataNumber", safetensors_bytes(R"({"__metadata__":{"a":1}})", ""),
       "\"__metadata__\": expected strings, found 1"},
      {"MetadataNested", safetensors_bytes(R"({"__metadata__":{"a":{}}})", ""),
       "\"__metadata__\": expected strings, found an object"},
      {"MetadataList", safetensors_bytes(R"({"__metadata__":[]})", ""),
       "\"__metadata__\": expected an object, found a list"},
      {"MetadataString", safetensors_bytes(R"({"__metadata__":"pt"})", ""),
       "\"__metadata__\": expected an object"},
      {"Overlap",
       safetensors_bytes("{\"a\":" + f32 + ",\"b\":" + entry("F32", "[1]", "[2,6]") + "}",
                         "123456"),
       "tensor \"b\": \"data_offsets\": expected to begin at 4"},
      {"Hole",
       safetensors_bytes("{\"a\":" + f32 + ",\"b\":" + entry("F32", "[1]", "[5,9]") + "}",
                         "123456789"),
       "tensor \"b\": \"data_offsets\": expected to begin at 4 (no holes, no overlaps), begins at "
       "5"},
      {"SameBytesTwice", safetensors_bytes("{\"a\":" + f32 + ",\"b\":" + f32 + "}", "1234"),
       "expected to begin at 4"},
      {"FirstOffsetNotZero", one(entry("F32", "[1]", "[4,8]"), "12345678"),
       "expected to begin at 0"},
      {"EndBeforeBegin", one(entry("F32", "[1]", "[4,0]")), "the end 0 is before the begin 4"},
      {"NegativeOffset", one(entry("F32", "[1]", "[-4,0]")),
       "\"data_offsets\": expected integers from 0 to 2^64 - 1, found -4"},
      {"MinusZero", one(entry("F32", "[1]", "[-0,4]")), "\"data_offsets\": expected integers"},
      {"FloatOffset", one(entry("F32", "[1]", "[0,4.0]")), "found 4.0"},
      {"ExponentOffset", one(entry("F32", "[1]", "[0,4e0]")), "found 4e0"},
      {"Offset2To64", one(entry("F32", "[1]", "[0,18446744073709551616]")),
       "found 18446744073709551616"},
      {"OffsetMax", one(entry("F32", "[1]", "[0,18446744073709551615]")),
       "dtype and shape need 4 bytes, the offsets hold 18446744073709551615"},
      {"ThreeOffsets", one(entry("F32", "[1]", "[0,4,4]")), "expected 2 numbers, found more"},
      {"OneOffset", one(entry("F32", "[1]", "[0]")), "expected 2 numbers, found 1"},
      {"NoOffsets", one(R"({"dtype":"F32","shape":[1]})"), "\"data_offsets\" is missing"},
      {"NoShape", one(R"({"dtype":"F32","data_offsets":[0,4]})"), "\"shape\" is missing"},
      {"NoDtype", one(R"({"shape":[1],"data_offsets":[0,4]})"), "\"dtype\" is missing"},
      {"OffsetsNull", one(entry("F32", "[1]", "null")), "\"data_offsets\": expected a list"},
      {"OffsetsObject", one(entry("F32", "[1]", R"({"0":0,"1":4})")), "found an object"},
      {"OneByteShort", one(f32, "123"), "describes 4 bytes of tensors, the file holds 3"},
      {"OneByteExtra", one(f32, "12345"), "describes 4 bytes of tensors, the file holds 5"},
      {"ShapeMismatch", one(entry("F32", "[2]", "[0,4]")),
       "dtype and shape need 8 bytes, the offsets hold 4"},
      {"DtypeMismatch", one(entry("F16", "[1]", "[0,4]")),
       "dtype and shape need 2 bytes, the offsets hold 4"},
      {"ProductOverflow", one(entry("F32", "[9223372036854775808,4,0]", "[0,0]"), ""),
       "\"shape\": its product exceeds 2^64"},
      {"ProductWraps", one(entry("U8", "[4294967296,4294967297]", "[0,4294967296]"), ""),
       "\"shape\": its product exceeds 2^64"},
      {"BitsOverflow", one(entry("F32", "[1152921504606846976]", "[0,0]"), ""),
       "\"shape\": its bits exceed 2^64"},
      {"PartByte", one(entry("F4", "[7]", "[0,3]"), "123"), "do not fill whole bytes"},
      {"NegativeDim", one(entry("F32", "[-1]", "[0,4]")), "\"shape\": expected integers"},
      {"FloatDim", one(entry("F32", "[1.0]", "[0,4]")), "\"shape\": expected integers"},
      {"BoolDim", one(entry("F32", "[true]", "[0,4]")), "found true"},
      {"StringDim", one(entry("F32", "[\"1\"]", "[0,4]")), "found the string \"1\""},
      {"NestedDim", one(entry("F32", "[[1]]", "[0,4]")), "found a list"},
      {"ShapeNumber", one(entry("F32", "1", "[0,4]")), "\"shape\": expected a list"},
      {"Rank10000", one(entry("F32", rank, "[0,4]")), "expected at most 64 dimensions"},
      {"UnknownDtype", one(entry("F128", "[1]", "[0,4]")),
       "\"dtype\": \"F128\" is not a safetensors dtype"},
      {"LowerCaseDtype", one(entry("f32", "[1]", "[0,4]")), "\"f32\" is not a safetensors dtype"},
      {"DtypeNumber", one(R"({"dtype":3,"shape":[1],"data_offsets":[0,4]})"),
       "\"dtype\": expected a string, found 3"},
      {"DtypeObject", one(R"({"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]})"),
       "\"dtype\": expected a string, found an object"},
      {"TensorList", one(R"(["F32",[1],[0,4]])"), "\"a\": expected an object, found a list"},
      {"TensorNull", one("null", ""), "\"a\": expected an object, found null"},
      {"DeepLists", safetensors_bytes(deep, "1234"), "nested more than 127 levels deep"},
      {"DeepObjects", safetensors_bytes(deep_objects, ""), "nested more than 127 levels deep"},
      {"LoneHighSurrogate", safetensors_bytes("{\"\\ud800\":" + f32 + "}", "1234"),
       "not valid JSON"},
      {"LoneLowSurrogate", safetensors_bytes("{\"\\udc00\":" + f32 + "}", "1234"),
       "not valid JSON"},
      {"ControlCharacter", safetensors_bytes("{\"a\n\":" + f32 + "}", "1234"), "not valid JSON"},
      {"HugeNumberInUnknownField",
       one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1e400})"), "not valid JSON"},
  };
}

INSTANTIATE_TEST_SUITE_P(All, BadSafetensorsTest, ::testing::ValuesIn(bad_files()),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(SafetensorsTest, NamesTheOffsetOfAFault) {
  TemporaryFolder folder;
  const auto path =
      folder.write("x.safetensors", safetensors_bytes(R"({"a":{"dtype":"F99"}})", ""));
  EXPECT_MODEL_ERROR(SafetensorsFile::open(path), "header, byte 19: tensor \"a\": \"dtype\"");
}

TEST(SafetensorsTest, MessagesDoNotRepeatControlOrEndlessNames) {
  TemporaryFolder folder;
  const std::string name = "\\u001b[31m" + std::string(100'000, 'n');
  const auto path = folder.write("x.safetensors", safetensors_bytes("{\"" + name + "\":{}}", ""));
  try {
    SafetensorsFile::open(path);
    FAIL();
  } catch (const ModelError& error) {
    const std::string message = error.what();
    EXPECT_LT(message.size(), 500u);
    EXPECT_EQ(message.find('\x1b'), std::string::npos);
  }
}

// The largest headers: refused or read within memory in proportion to their size.
TEST(SafetensorsTest, HeaderOfTenMillionEntries) {
  TemporaryFolder folder;
  std::string header = "{";
  for (int i = 0; i < 10'000'000; i++) header += R"("a":{},)";
  header.back() = '}';
  const auto path = folder.write("x.safetensors", safetensors_bytes(header, ""));
  EXPECT_MODEL_ERROR(SafetensorsFile::open(path), "tensor \"a\": \"dtype\" is missing");
}

TEST(SafetensorsTest, HeaderOfManyValidEntries) {
  std::string header = "{";
  for (int i = 0; i < 50'000; i++) {
    header += "\"" + std::to_string(i) + "\":" + entry("U8", "[0]", "[0,0]") + ",";
  }
  header.back() = '}';
  EXPECT_EQ(entries_of(safetensors_bytes(header, "")).size(), 50'000u);
}

TEST(MappedFileTest, OnlyRegularFiles) {
  TemporaryFolder folder;
  const auto fifo = folder.path() / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_MODEL_ERROR(MappedFile::open(fifo), "expected a regular file, found a FIFO");
  EXPECT_MODEL_ERROR(MappedFile::open(folder.path()), "expected a regular file, found a directory");
  EXPECT_MODEL_ERROR(MappedFile::open("/dev/zero"), "expected a regular file, found a device");
  EXPECT_MODEL_ERROR(MappedFile::open(folder.path() / "none"), "No such file");
  std::filesystem::create_symlink("loop", folder.path() / "loop");
  EXPECT_MODEL_ERROR(MappedFile::open(folder.path() / "loop"), "cannot be opened");
  std::filesystem::create_symlink(fifo, folder.path() / "to_fifo");
  EXPECT_MODEL_ERROR(MappedFile::open(folder.path() / "to_fifo"), "found a FIFO");
}

TEST(MappedFileTest, FollowsALinkToAFile) {
  TemporaryFolder folder;
  folder.write("blob", "abc");
  std::filesystem::create_symlink("blob", folder.path() / "link");
  const MappedFile file = MappedFile::open(folder.path() / "link");
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(file.data()), file.bytes()), "abc");
}

TEST(MappedFileTest, NoticesAChangedSizeInsteadOfDying) {
  TemporaryFolder folder;
  const auto path = folder.write("x", std::string(1 << 20, 'x'));
  const MappedFile file = MappedFile::open(path);
  file.verify();
  file.prefault(5, 70'000);
  std::filesystem::resize_file(path, 100);
  EXPECT_MODEL_ERROR(file.verify(), "expected 1048576 bytes, the file has 100");
  EXPECT_MODEL_ERROR(file.prefault(0, file.bytes()), "changed size while it is in use");
}

TEST(MappedFileTest, SurvivesMoves) {
  TemporaryFolder folder;
  MappedFile a = MappedFile::open(folder.write("x", "abc"));
  MappedFile b = std::move(a);
  MappedFile c = MappedFile::open(folder.write("y", ""));
  EXPECT_EQ(c.bytes(), 0u);
  c.prefault(0, 10);
  c = std::move(b);
  EXPECT_EQ(c.bytes(), 3u);
  EXPECT_EQ(c.data()[2], 'c');
}

}  // namespace
}  // namespace mustafar
